"""The agent's limits and pauses, in seconds."""

TICK_SECONDS = 0.05  # of the loop: so long a signal may wait
OPEN_SECONDS = 120.0  # to open a link: torch's own limit to connect is 60, and it may hang after
RETRY_SECONDS = 2.0  # before it is tried again, at most; agents do not all come at once
ASK_SECONDS = 1.0  # between two questions for nodes that wait; torch keeps an answer as long
JOIN_SECONDS = 600  # torch's default of a rendezvous' `join_timeout`
SETTLE_SECONDS = 0.5  # workers that fail together do not end in the same instant
KILL_SECONDS = 5  # of a worker that SIGKILL does not end: the kernel keeps it
LEAVE_SECONDS = 2.0  # to tell the others, if the store still answers
READ_SECONDS = 10.0  # for one look at the run; a storage that is away must not hold the agent up
LOOK_SECONDS = 5.0  # between two looks while workers train
LAST_LOOK_SECONDS = 1.0  # for the post-mortem: the grace is for the workers
SOUND_SECONDS = 300.0  # where progress is not known, a round that lasted so long counts as one
LONGEST_PAUSE_SECONDS = 30.0  # between rounds in vain
SCRAPE_SECONDS = 10.0  # of a connection to the metrics' port: who asks nothing holds a thread
STALLED_SECONDS = 30.0  # without a turn of the loop the agent is not healthy
