"""A light simulator of federated fine-tuning over clients that afford different LoRA ranks.

`python -m fed` is the command line. The parts are folders, each of which imports only from those below it:

    report        finished files to tables, figures and pages
    experiments   one run or a plan of runs, from a configuration to files on disk
    simulation    the round loop: sample, start, train, aggregate, measure, save
    training      how clients train: one by one, or several in one pass
    models        the base model, and the one copy of it that all clients train on
    data          rows of digits or text, held out and dealt to clients
    config        the TOML file, typed
    methods       Fed-PLoRA and the methods it is compared with, one file each
"""
