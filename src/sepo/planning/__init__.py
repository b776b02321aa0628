"""Planning: what a run will do, how long it takes, and what fits. The door for the command line is `sepo.api.plan_run`.

plan.py          dry runs: walks the method without doing it
stages.py        what each stage costs
cost.py          the types of sizes, compute and memory
sizes.py         counts of the pairs, shapes of the models
throughput.py    seconds of compute on this machine, measured or from FLOPs
eta.py           the line of a run: stage, progress, time left
memory.py        bytes of a device, from a model's shape
"""
