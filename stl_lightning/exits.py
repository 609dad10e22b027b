"""Exit codes: what a scheduler, a supervisor or a script may conclude from how a command ended."""

DONE = 0
FAILED = 1  # a branch failed for its own reasons, which its status.json keeps
REFUSED = 2  # the user can cure it: the message says how
UNFINISHED = 3  # `stl status` only: nothing failed, and not all branches have finished
INTERRUPTED = 75  # asked to leave, saved: the same command goes on (EX_TEMPFAIL of sysexits.h)
FENCED = 74  # a newer attempt owns the branch; below 75, since of several ranks the highest code counts
