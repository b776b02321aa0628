"""Training: losses over pairs, and a Trainer over packed pairs.

objectives     the formula of each objective
batches        pairs in batches: their order (from seed and epoch) and their packed rows
dropout        turns off the randomness of a model in training
trainer        PreferenceTrainer, PreferenceConfig
checkpoints    when to save, and which checkpoints and finished models can be reused
interrupt      Ctrl-C finishes the step and saves a checkpoint
logs           reporters, their files, the progress bar
fit            a whole training: model and table in, trained model in a folder out
check          checks the settings of a training before a run starts
"""
