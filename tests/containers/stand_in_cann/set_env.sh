export ASCEND_HOME_PATH=/usr/local/Ascend/ascend-toolkit
