"""What every package needs: settings, session, errors, secrets, scratch folders, logs."""
