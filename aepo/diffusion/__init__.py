"""The diffusion's mathematics as pure functions of tensors: schedule [M2], posterior [M9, M10], sampler [M4, M13]."""
