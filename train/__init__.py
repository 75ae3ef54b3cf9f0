"""The laboratory: from atoms to a shipped network.

Read in the order of the work::

    structures/      atoms: Pt nanoparticles on CeO2, Au on SrTiO3, with surface defects
    imaging.py       atoms -> noiseless HRTEM images (abTEM multislice)
    simulate.py      many images to disk, in parallel, resumable (shards.py: the files; preview.py: a contact sheet)
    dataset.py       images from disk, checked; random views of them for training
    photographs.py   the other images: photographs that come with Python packages
    noise.py         Poisson at any dose, and cameras
    models/          the networks
    recipe.py        what a run is told, and its checkpoints (recipes/: one for every row of the tables)
    fit.py           one readable training run (losses.py: what it minimises; log.py: what it writes down)
    export.py        checkpoint -> ONNX engine with its card
    networks.py      trained networks, wherever they are
    baselines.py     what one would use without a network, tuned
    metrics.py       PSNR and SSIM as the paper has them
    surface.py       whether the columns on the particle's surface are right
    evaluate.py      all of these on structures the network has not seen (plots.py: the figures)
    tables.py        the paper's tables and ours (published.toml: the paper's)
    explain.py       which counts made a pixel, and whether they support it
    camera_stack.py  the specimen that the simulated camera shows
    reproduce.py     all of it, from nothing, in one command
    command.py       how all of these say what is wrong
"""
