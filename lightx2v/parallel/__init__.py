"""One video on several devices: tokens, guidance and frames shared out between processes, over torch.distributed."""
