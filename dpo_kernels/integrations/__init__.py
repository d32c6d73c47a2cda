"""Drop-ins for the interfaces of other libraries. Nothing here is imported by ``import dpo_kernels``."""
