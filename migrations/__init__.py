"""How the schema came to be. Schema changes expand first and contract a release later."""
