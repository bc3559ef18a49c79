"""Classes of pixels: the predictor's outputs on the patch grid, the encoder, or both, tuned (IWM, section 5)."""
