{
  # Compiles nothing itself: CMakeLists.txt is the only description of the build. npm, node-gyp and prebuildify call
  # `node-gyp rebuild`; the one target below answers by running the script that everybody else runs.
  "targets": [
    {
      "target_name": "couplet",
      "type": "none",
      "actions": [
        {
          "action_name": "cmake",
          "message": "building with CMake",
          "inputs": [],
          # .always is never written, so the action always runs and CMake decides what is stale.
          "outputs": ["<(PRODUCT_DIR)/couplet.node", "<(PRODUCT_DIR)/.always"],
          "action": [
            "node", "<(module_root_dir)/scripts/build.mjs",
            "--config", "<(CONFIGURATION_NAME)",
            "--to", "<(module_root_dir)/build/<(CONFIGURATION_NAME)"
          ]
        }
      ]
    }
  ]
}
