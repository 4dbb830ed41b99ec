"""What the model class is made with: weights into parameters, settings of kernels."""
