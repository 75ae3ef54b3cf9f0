"""The laboratory: from atoms to a shipped network.

Read in the order of the work::

    structures.py   atoms: Pt nanoparticles on CeO2, with surface defects
    imaging.py      atoms -> noiseless HRTEM images (abTEM multislice)
    dataset.py      many images to disk, resumable; random views of them for training
    models/         the networks
    fit.py          one readable training run
    export.py       checkpoint -> ONNX engine with its card
    evaluate.py     PSNR and SSIM on structures the network has not seen
"""
