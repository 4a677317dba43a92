"""The offline stages of convline, one module for each command, in this order:

    download ─► preprocess ─► train ─► average ─► evaluate ─► export ─► parity ─► classify
    archives    uint8 arrays  raw weights + EMA   precision@k  .onnx     proof     folder → table

`classify` is in the package `serving`. A recipe (`recipe`) says what to train. The folders (`preparing`, `training`,
`exporting`, `reporting`, `tracking`) hold the parts that the stages are made of, and never import a stage.
"""

import os

# How often torch's threads look for work before they sleep (libgomp reads it when torch is imported). By default they
# look for 6 ms, and beside other work keep each other from the CPU. With 2,000, some 40 µs, trainings keep twice as
# much of their speed there, and 0.8 to 1 of it alone (benchmarks/beside_others.py).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
