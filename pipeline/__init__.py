"""The offline stages of convline, one module each, in this order:

    download ─► preprocess ─► train ─► average ─► evaluate ─► export ─► parity ─► classify
    archives    uint8 arrays  raw weights + EMA   precision@k  .onnx     proof     folder → table

The last one is `serving`. Machinery that the stages share is in `engine/`; `recipe` says what to run.
"""
