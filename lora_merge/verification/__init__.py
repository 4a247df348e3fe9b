"""An output proved against its own record, or against its inputs."""
