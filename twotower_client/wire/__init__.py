"""The messages of twotower.v1, made from protos/."""
