TORCH_VERSION: str
CXX: str
CUDA_VERSION: str | None
CUDA_ARCHS: list[str]
CUTLASS_VERSION: str | None
