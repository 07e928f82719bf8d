"""Where bytes live and where work runs; nothing here knows about learning."""
