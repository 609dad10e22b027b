"""What can be measured. Each module has `measure(setting)`, which yields the rows of its subject."""

# module -> what it shows
SUBJECTS = {
    "stacked": "16 MLPs trained at once, against a loop by hand, sequential loops, Lightning and two packages",
    "rank": "one branch a process, against a plain loop on tensors",
    "convnet": "4 ConvNets, stacked and alone, float32 and bfloat16, against plain loops",
    "ensemble": "16 members on a batch of images, against forward calls one after the other",
    "startup": "what a user waits for: --help, and the first step of a training",
    "memory": "the most memory a rank holds, against what it has to hold",
    "transform": "splitting images into slices, against copying them",
    "store": "writing a slice store and reading from it, against plain arrays",
    "augment": "augmentation inside slices, as a share of a training step",
    "loop": "minibatches handed to Lightning one by one or in chunks",
    "gpu": "16 branches stacked on a GPU, against one of them",
    "options": "bfloat16, channels_last, fused Adam and torch.compile, each against without",
}
