"""What a running process needs: ranks, interruption, a profile, something to say."""
