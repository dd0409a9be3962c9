"""`bench`: puts a load on a running service and reports what its clients saw. It asks through twotower_client, without
torch or an engine.
"""
