"""Task data, partial fine-tuning and distillation: from a task spec to a branch file. Needs the extra `train`."""
