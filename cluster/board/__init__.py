"""What operators see: the service now and over its last hours, collected beside the requests, shown at `/ops`."""
