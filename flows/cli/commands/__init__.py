"""The commands' options and help texts, by what they are about; `flows.cli.app` has their names and order."""
