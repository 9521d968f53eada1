"""How completions are rewarded: functions, their calls, their processes, and reward models."""
