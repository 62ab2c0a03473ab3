"""Exchange with the engines people run, one engine a file.

Recorded routing comes in (`placement.interop.importers`), placement plans go out and come back
(`placement.interop.targets`). The schemas are in docs/engines/.
"""
