"""Training: losses over pairs, and a Trainer over packed pairs.

objectives     every method as its formula
batches        pairs -> packed rows, in an order that seed and epoch give
trainer        PreferenceTrainer, PreferenceConfig
checkpoints    what a training continues from, or need not do again
fit  sft       a model and a table -> a trained model in a folder
"""
