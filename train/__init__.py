"""The laboratory: from atoms to a shipped network.

Read in the order of the work::

    structures/     atoms: Pt nanoparticles on CeO2, Au on SrTiO3, with surface defects
    imaging.py      atoms -> noiseless HRTEM images (abTEM multislice)
    simulate.py     many images to disk, in parallel, resumable (shards.py: the files; preview.py: a contact sheet)
    dataset.py      images from disk, checked; random views of them for training
    noise.py        Poisson at any dose, and cameras
    models/         the networks
    fit.py          one readable training run
    export.py       checkpoint -> ONNX engine with its card
    evaluate.py     PSNR and SSIM on structures the network has not seen
"""
