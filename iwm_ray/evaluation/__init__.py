"""What a trained world model is worth, in numbers: MRR, action regression, prediction error, kNN, rank, health."""
