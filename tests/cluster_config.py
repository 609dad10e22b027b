"""The configuration of the test cluster: slurm.conf and the files beside it."""

import contextlib
import os
import re
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

Mode = Literal["namespaces", "plain"]

NODES = ("n1", "n2", "n3", "n4")
CPUS_PER_NODE, GPUS_PER_NODE = 4, 2  # claimed, not real: the GPUs are device files without a device
SUBNET = "10.231.0"  # seen inside the namespaces only

CONF = """ClusterName=test
SlurmctldHost={ctl_host}({ctl_addr})
SlurmctldPort={ctl_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/{auth}
CredType=cred/{auth}
AuthInfo={auth_info}
# Without these two SLURM listens on every address of the machine.
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
# Nodes claim more than the machine has.
SlurmdParameters=config_overrides
# A node that was lost comes back by itself; one that was set down stays down.
ReturnToService=1
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# Failures are noticed, and killed jobs given up, within seconds.
SlurmdTimeout=10
KillWait=5
MinJobAge=3600
MessageTimeout=5
GresTypes=gpu
{nodes}
PartitionName=debug Nodes=ALL Default=YES DefaultTime=10 MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL DefaultTime=10 MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""


def address(node: str) -> str:
    """Of a node or of the controller, where they have a network of their own."""
    return f"{SUBNET}.{254 if node == 'ctl' else NODES.index(node) + 1}"


def write_config(folder: Path, mode: Mode) -> None:
    """Everything that the daemons expect in the folder of a cluster."""
    for name in ("run", "log", "state", "munge", "gpu", *(f"spool/{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    for index in range(GPUS_PER_NODE):
        _device(folder / "gpu" / f"gpu{index}")
    hosts = "".join(f"{address(node)} {node}\n" for node in ("ctl", *NODES))
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + hosts)
    services = Path("/etc/nsswitch.conf").read_text() if Path("/etc/nsswitch.conf").exists() else ""
    (folder / "nsswitch.conf").write_text(re.sub(r"(?m)^hosts:.*$", "", services) + "\nhosts: files\n")
    gpus = f"Name=gpu Type=fake File={folder}/gpu/gpu[0-{GPUS_PER_NODE - 1}]"
    (folder / "gres.conf").write_text(f"NodeName=n[1-{len(NODES)}] {gpus}\n")
    # slurmd loads a cgroup plugin although no job uses one; unnamed, it looks for a file system it may not see.
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (folder / "slurm.conf").write_text(_slurm_conf(folder, mode))


def _slurm_conf(folder: Path, mode: Mode) -> str:
    """Nothing outside reaches private networks, so no authentication there; loopback ports are guarded by munge."""
    private = mode == "namespaces"
    ports = [6817] + [6818] * len(NODES) if private else free_ports(1 + len(NODES))
    host = socket.gethostname().split(".")[0]
    claim = f"CPUs={CPUS_PER_NODE} RealMemory=4000 Gres=gpu:fake:{GPUS_PER_NODE} State=UNKNOWN"
    nodes = [
        f"NodeName={node} NodeHostname={node if private else host} "
        f"NodeAddr={address(node) if private else '127.0.0.1'} Port={port} {claim}"
        for node, port in zip(NODES, ports[1:], strict=True)
    ]
    return CONF.format(
        ctl_host="ctl" if private else host,
        ctl_addr=address("ctl") if private else "127.0.0.1",
        ctl_port=ports[0],
        user=subprocess.check_output(["id", "-un"], text=True).strip(),
        folder=folder,
        auth="none" if private else "munge",
        auth_info="cred_expire=5" + ("" if private else f",socket={folder}/munge/socket"),
        nodes="\n".join(nodes),
    )


def _device(path: Path) -> None:
    """A device file like /dev/null where we may make one, else an empty file: SLURM only looks whether it is there."""
    try:
        os.mknod(path, 0o20666, os.makedev(1, 3))
    except PermissionError:
        path.touch()


def free_ports(count: int) -> Sequence[int]:
    """Loopback ports that are free now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
