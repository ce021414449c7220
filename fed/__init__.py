"""A light simulator of federated fine-tuning with clients whose LoRA adapters have different ranks.

`python -m fed` is the command line. The parts are folders, each of which imports only from those below it:

    report        tables, figures and HTML pages from the files of finished runs
    experiments   one run or a comparison of runs, from a configuration to files on disk
    simulation    the round loop: draw clients, start, train, aggregate, measure, save
    training      local training of clients: one after another, or several in one pass
    models        the base model, and the one copy of it that all clients train on
    data          digits or text: held-out sets, and the samples of each client
    config        the settings of the TOML file as typed objects
    methods       Fed-PLoRA and the methods it is compared with, one file each
"""
