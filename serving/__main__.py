from serving.cli import run

run()
