"""What a model is: config, decoder, sites, loading and saving."""
