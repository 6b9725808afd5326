"""efficap: any timm EfficientNet, joined to any GPT-2 by cross-attention, trained to caption pictures."""
