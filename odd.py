def reward(prompt, response, answer): return sum(map(ord, response)) % 2, 1
