"""The planner's commands, one thin file each; `exflow` mounts them too."""
