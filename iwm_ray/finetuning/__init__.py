"""Leveraging the world model: the predictor, the encoder or both, tuned for tasks (IWM, section 5)."""
