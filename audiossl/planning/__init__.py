"""What will a run cost, will it fit, and how is it submitted?"""
