"""Which branches a process owns, from the variables that launchers set."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stl_lightning.errors import ConfigError
from stl_lightning.ranks import RankInfo

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
BATCH_SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
ARRAY = BATCH_SCRIPT | {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_NTASKS": "1"}

ENVIRONMENTS = {
    "nothing": ({}, RankInfo("none", 0, 1, 0)),
    "torchrun": (TORCHRUN, RankInfo("torchrun", 5, 8, 1)),
    "srun": (STEP, RankInfo("srun", 2, 4, 0)),
    "a batch script has the variables of a task, but is none": (BATCH_SCRIPT, RankInfo("none", 0, 1, 0)),
    "a sparse array": (ARRAY, RankInfo("slurm-array", 7, None, 0)),
    "torchrun inside a step": (STEP | TORCHRUN, RankInfo("torchrun", 5, 8, 1)),
    "srun of one task inside an array task": (
        ARRAY | {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0"},
        RankInfo("slurm-array", 7, None, 0),
    ),
}


@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_detection(case: str) -> None:
    environ, expected = ENVIRONMENTS[case]
    assert RankInfo.detect(environ) == expected


def test_a_variable_that_is_no_number_is_named() -> None:
    with pytest.raises(ConfigError, match="WORLD_SIZE, got 'many'"):
        RankInfo.detect(TORCHRUN | {"WORLD_SIZE": "many"})


@given(st.integers(1, 40), st.integers(1, 40))
def test_every_branch_has_one_owner(n_branches: int, world_size: int) -> None:
    if world_size > n_branches:
        with pytest.raises(ConfigError, match=f"{n_branches} branches"):
            RankInfo("torchrun", 0, world_size).branches(n_branches)
        return
    owned = [RankInfo("torchrun", rank, world_size).branches(n_branches) for rank in range(world_size)]
    assert sorted(branch for branches in owned for branch in branches) == list(range(n_branches))
    assert max(map(len, owned)) - min(map(len, owned)) <= 1


@given(st.sets(st.integers(0, 40), min_size=1), st.integers(1, 40))
def test_each_of_the_branches_that_are_named_has_one_owner(branches: set[int], world_size: int) -> None:
    ranks = [RankInfo("torchrun", rank, world_size) for rank in range(world_size)]
    if world_size > len(branches):
        assert ranks[-1].share(sorted(branches)) == tuple(sorted(branches))
        return
    assert sorted(branch for rank in ranks for branch in rank.share(sorted(branches))) == sorted(branches)


def test_an_array_task_owns_the_branch_of_its_number() -> None:
    assert RankInfo("slurm-array", 7, None).share([3, 5]) == (3, 5)
    assert RankInfo("slurm-array", 7, None).branches(16) == (7,)
    with pytest.raises(ConfigError, match="array task 16"):
        RankInfo("slurm-array", 16, None).branches(16)
