"""What is drawn with: profiles, pipelines, classifiers, data and captions."""
