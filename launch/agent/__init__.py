"""`python -m launch.agent`: torchrun's flags, with exit codes, signals and losses that are kept.

    __main__      the signal handlers, before anything slow
    life          from the command line to the exit code and the post-mortem
    arguments     torchrun's own flags and ours
    rounds        the loop: meet, start workers, watch them, judge how they ended: START HERE
    workers       one host's worker processes, as torch's elastic agent starts them
    connection    the link to the store in which agents meet, opened again when it is lost
    rendezvous    that link: torch's rendezvous, its silence and its generations
    aside         what may never come back is asked on a thread that can be left behind
    notices       the signals that the agent got
    outcome       from the exit codes of workers to what follows, and to the agent's own
    budget        how often it is tried again
    progress      how far the run is
    postmortem    what Kubernetes shows of a pod that has ended
    metrics       /metrics and /healthz
    orphans       the duty of a PID 1

docs/decisions/0012-agent.md says why.
"""
