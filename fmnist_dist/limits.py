"""Every wait's limit, in seconds, in one place. Whatever passes its limit ends with an exit code.

What the user may set (`--step-timeout`, `--drain-seconds`, `--max-unsaved-seconds`) is in `config`;
the watchdog's limits of a trainer's sections are in `keeper.watchdog`.
"""

ROLL_CALL_SECONDS = 120.0  # keepers: a node may still be importing torch from a cold disk
STORE_SECONDS = 60.0  # to connect to the launcher's store
ANSWER_SECONDS = 10.0  # of that store: its host may be cut off, or stopped
ALIVE_SECONDS = 2.0  # keepers count for the others to see
SILENT_SECONDS = 20.0  # a keeper that does not count for so long is lost, and its host with it
FIRST_MEETING_SECONDS = 900.0  # trainers: a node may still be downloading the data set
MEETING_SECONDS = 60.0  # trainers, after that: a peer may be busy with an evaluation or a save
EARLY_SAVE_SECONDS = 5.0  # in a meeting; then the state is saved, should nobody come
BUILD_SECONDS = 5.0  # of a process group, once all have arrived
REGROUP_SECONDS = 120.0  # of generations that fail one after the other, without a step between
TOLD_SECONDS = 300.0  # what rank 0 tells the others: it may be checking a large checkpoint
FAREWELL_SECONDS = 5.0  # rank 0 waits so long for the others to have heard why it leaves
COLLECTIVE_SECONDS = 1800.0  # last resort: keepers find who is stuck long before
SECURE_SECONDS = 2.0  # a rank lets the ones before it save the state that all hold
COMPARE_SECONDS = 60.0  # rank 0 waits for the digests of the others' copies, beside training
ABANDON_SECONDS = 2.0  # a save that is given up ends before its next file
LAND_SECONDS = 30.0  # a save under way may end before a rollback judges what is durable
LAZY_POLL_SECONDS = 0.01  # between two looks at something that may take long
ROLL_CALL_POLL_SECONDS = 0.005  # of keepers at the store
LEAVE_SECONDS = 1.0  # to come out of a collective whose connections are closed
LOOKOUT_SECONDS = 0.1  # between two looks of a trainer's second thread
KEEPER_SECONDS = 0.2  # between two looks of a keeper at its trainer
STACKS_SECONDS = 1.0  # a stuck trainer gets to print the stacks of its threads
DEATH_SECONDS = 30.0  # of a trainer that was killed; what waits for a dead disk does not die
KILL_SECONDS = 1.0  # what a keeper keeps of a drain's time: to kill, and to save in its place
RESCUE_SECONDS = 30.0  # saving from the keeper's memory
LOCAL_TIER_SECONDS = 60.0  # for one thing asked of the local tier's disk; then it is let alone
LONG_SAVE_SECONDS = 10.0  # and three times the last one's: then a save under way is told of
SAVE_RETRY_SECONDS = 5.0  # after a save that failed; storage that is full stays so for a while
LAST_TRY_SECONDS = 1.0  # with less time left than this, or a tenth of it, it is not tried again
SAY_SECONDS = 5.0  # rank 0 says what is wrong, before torchrun ends it because another rank ended
STORAGE_SECONDS = 60.0  # one operation on object storage with all its tries, besides its bytes
STORAGE_FIRST_SECONDS = 10.0  # to a store that this process has never reached: a wrong address?
STORAGE_REQUEST_SECONDS = 15.0  # one request of it, likewise: another connection may be better
STORAGE_CONNECT_SECONDS = 5.0
NAME_SECONDS = 1.8  # for the address of a host that had one before: RFC 8767, section 5
STORAGE_SILENCE_SECONDS = 10.0  # of a connection on which an answer is due
STORAGE_BYTES_PER_SECOND = 250_000  # so long may bytes take; what is slower counts as stalled
STORAGE_PAUSE_SECONDS = 0.1  # before the second try, at most twice that; doubles, with jitter
STORAGE_LONGEST_PAUSE_SECONDS = 8.0
WEB_SILENCE_SECONDS = 20.0  # of a download without a single byte, until one attempt is given up
WEB_SECONDS = 300.0  # for all files of a data set, so that a trickle is given up too
WEB_PAUSE_SECONDS = 1.0  # before the second try; doubles
APT_SECONDS = 120.0  # each of at most four commands: 31 MB of package, 10 MB of lists
APT_SILENCE_SECONDS = 20  # of apt's own downloads
# Longer than all limits of one fetch together, so that it passes only when the holder of the data
# set's lock hangs where no limit of ours reaches, say on a dead disk.
DATA_LOCK_SECONDS = 900.0


def kill_reserve_seconds(drain_seconds: float) -> float:
    """Return what a keeper keeps of a drain's time: to kill, and to save in the trainer's place."""
    return min(KILL_SECONDS, drain_seconds / 4)


def poll_seconds(waited: float) -> float:
    """Return the pause between two looks at the store after so many seconds of waiting for it.

    An answer is expected at once; later it may take long, and the store has others to serve.
    """
    return 0.0005 if waited < 1 else LAZY_POLL_SECONDS
