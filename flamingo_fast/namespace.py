"""What PyTorch knows the package's ops and types by: an exported copy is loaded beside it."""

NAMESPACE = "flamingo_fast"
