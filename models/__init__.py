"""What is trained: the CoAtNet family. This module, `spec` and `cost` never import torch."""
