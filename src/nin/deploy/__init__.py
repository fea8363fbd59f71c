"""The use of a checkpoint: predict, score maps, export, serve.

A module imports only from the modules below it. Those marked * import torch; the others run without it:

    server                      runs the HTTP service until a signal ends it
    service                     its routes, limits and metrics
    requests, batching          the content of a request; scores the images of concurrent requests together
    triton, compiled            * exports for Triton and KServe, and for C++
    export                      * the ONNX export, and the check of every export on the whole test set
    quantize                    int8
    loading                     what a path is: a run, a checkpoint or an export
    scoring, map_figures        test metrics of an export; pictures of score maps
    pipeline, onnx_model        * a checkpoint with all preprocessing, by torch; an export, by onnxruntime
    trained                     what both are for Python code
    images                      the user's own images, decoded
"""
