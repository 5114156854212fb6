"""CoTAP: pretrained vision transformers whose patches of one object are brought together by a ranking loss."""
