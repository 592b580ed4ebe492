"""How the demo checkpoint is trained: an autoencoder, a text encoder that reads, then the denoiser."""
