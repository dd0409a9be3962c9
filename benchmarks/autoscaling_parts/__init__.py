"""Parts of the autoscaling benchmark."""
