"""What a trained world model is worth, in numbers: MRR, kNN, rank and spread of the features, health."""
