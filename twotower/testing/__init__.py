"""Stand-ins for tests, shipped: towers that follow a script, channels that misbehave. Production imports none of it."""

from twotower.testing.channels import ChannelFaults, FaultyChannel
from twotower.testing.towers import ScriptedContextTower, ScriptedDenoiserTower, scripted_scores, scripted_tokens

__all__ = [
    "ChannelFaults",
    "FaultyChannel",
    "ScriptedContextTower",
    "ScriptedDenoiserTower",
    "scripted_scores",
    "scripted_tokens",
]
