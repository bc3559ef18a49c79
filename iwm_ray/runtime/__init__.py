"""Where a run meets Ray and MLflow: the only home of both."""
