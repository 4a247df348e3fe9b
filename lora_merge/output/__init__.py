"""The output in the making: a stage, until one rename makes it whole."""
